"""A server for models of this project: requests by HTTP in OpenAI's format, answered by workers with an engine each."""
