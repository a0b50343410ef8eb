"""`sample.py`: generate text from a trained model."""
