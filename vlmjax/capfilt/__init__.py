"""CapFilt (2201.12086, section 3.3): captions for web images, and only those kept that a filter believes."""
