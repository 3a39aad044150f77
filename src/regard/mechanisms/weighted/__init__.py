"""Named weighted systems, a file each."""
