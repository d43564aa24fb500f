"""The reports, one a module: ``document(records)`` in the module named like the sweep. That path is the registry."""
