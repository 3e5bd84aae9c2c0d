"""The command `univigu`: read the arguments, call, print."""
