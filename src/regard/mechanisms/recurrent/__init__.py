"""Named recurrent systems, a file each."""
