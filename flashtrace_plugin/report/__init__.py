"""Reports that open in any browser, without a network and without JavaScript."""
