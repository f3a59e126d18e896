"""What every function of the package needs: namespaces, checks, loops."""
