"""The command `univigu`: parse arguments, call functions, print results."""
