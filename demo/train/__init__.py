"""Training of the demonstration models, and the tokens that they must give."""
