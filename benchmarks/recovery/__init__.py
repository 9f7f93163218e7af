"""What the loss of a data parallel rank costs the others, and after how long it serves again."""
