"""Values: adapters, configs, files of their own kind. They know no model and no method."""
