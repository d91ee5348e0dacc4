"""From calibration data to h: everything that the pre-pass does before it writes a file."""
