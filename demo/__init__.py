"""What `make serve` demonstrates: two small trained models, and the script that serves them."""
