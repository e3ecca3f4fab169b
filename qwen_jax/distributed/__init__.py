"""The processes of one job: how they find each other, agree, notice that one is missing, and stop together."""
