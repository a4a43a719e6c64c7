"""What stays, sinks, rises and goes, and for whom: tenants, pins, floors, admission."""
