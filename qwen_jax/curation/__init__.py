"""From crawled pages to a training set (report section 2.1): on CPU workers, without a model of this project."""
