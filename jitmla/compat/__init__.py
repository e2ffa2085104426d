"""jitmla's ops under the names, signatures and tensor layouts of other libraries, to replace them one for one."""
