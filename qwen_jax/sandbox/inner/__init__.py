"""What runs between the host and the program: a process of the standard library alone, which no other room imports."""
