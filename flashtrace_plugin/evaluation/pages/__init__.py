"""Pages and figures that are written from the folders of runs."""
