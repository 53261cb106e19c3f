"""Options: their schema, presets, recipes, options of single layers, and how they are merged."""
