"""Evaluation of chat models: their answers to held-out prompts, and how people rank them (report 3.3, A.2.2)."""
