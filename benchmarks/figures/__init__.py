"""The report's figures. Each function draws one as an SVG data URI, or gives None for nothing."""
