"""Problems on which a rule is checked."""
