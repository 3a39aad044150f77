"""Named systems, one short file each, in folders by shape. Read a file to learn the paper."""
