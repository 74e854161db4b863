"""Tasks of the server: what is done with the model when a version closes, beside averaging."""
