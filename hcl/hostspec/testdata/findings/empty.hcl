# ERROR: The spec has no host block && ERROR: The spec has no image block && ERROR: The spec has no pool block
