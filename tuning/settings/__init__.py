"""All that can be set: configurations, plans, search spaces and the YAML files they come from."""
