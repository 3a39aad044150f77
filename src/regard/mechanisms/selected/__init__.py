"""Named selected systems, a file each."""
