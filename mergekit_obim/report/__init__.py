"""A merge, looked at afterwards or instead.

``gather``   goes through the merge without merging, and counts
``figures``  the charts
``page``     the report, one file for people and one for machines
``card``     a section of the merged model's card
"""
