"""Tools, agents that call them, and what they are measured by (report 3.4)."""
