"""Facts about upstream's sources on which the plugin relies, checked for each release."""
