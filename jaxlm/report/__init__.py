"""Pages and plots, made from files only."""
