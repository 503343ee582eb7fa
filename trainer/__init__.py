"""Training and evaluation of both stages on one loop."""
