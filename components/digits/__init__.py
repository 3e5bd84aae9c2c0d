"""The built-in toy dataset of the profiles `tiny` and `smoke`: moving handwritten digits with known attributes."""
