"""The processes of one job: joining, agreement, detection of lost processes, and a common stop."""
