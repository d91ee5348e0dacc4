"""What each expert contributes to a merge.

``gather``   goes through a merge without merging, and counts
``summary``  the counts as plain numbers
``figures``  the charts
``page``     the numbers and charts as one HTML file, by the template ``page.html.jinja``
``card``     a section of the merged model's card
"""
