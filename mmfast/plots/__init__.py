"""Pictures of what a Monitor wrote, and of a block's statistics. The standard library and matplotlib; no torch."""
