"""Named reduced systems, a file each."""
