"""Reports that open in any browser, without a network, and say the most without JavaScript, too."""
