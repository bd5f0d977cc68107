RESOURCES: dict[str, tuple[int, int]] = {}
