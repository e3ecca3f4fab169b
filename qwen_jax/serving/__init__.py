"""A server of OpenAI's protocol over the generation engine."""
