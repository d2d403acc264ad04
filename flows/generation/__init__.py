"""Continuing prompts with a round's model: ranks are launched in the run's layout, and text is shown as it comes."""
