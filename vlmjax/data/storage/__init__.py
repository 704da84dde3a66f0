"""Where shards lie: local files, remote ones in a bounded cache, and the indexes of what they hold."""
