"""Learning from preferences (report 3.2): reward models, and policies that are trained on comparisons or rewards."""
