"""What checks of several rows share, by idea."""
