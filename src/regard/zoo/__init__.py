"""One home for each row of the catalogue: zoo/<family>/<slug>.py, `-` of the slug written `_`."""
