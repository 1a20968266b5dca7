"""`reshard watch`: a run that is followed."""
