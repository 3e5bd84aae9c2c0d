"""Generic parts of the evaluation: shares, intervals and comparisons of attribute claims."""
