//! What GetContainerEvents sends.
