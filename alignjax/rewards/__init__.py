"""Prompts and completions -> rewards: rule-based functions, run in processes that can be killed."""
