//! Images: references, registries, pulls, records.
//!
//! [`Images`] is the facade. `pull` tells a pull's story: `source` asks the `registry` endpoints
//! that `hosts` names for the `manifest`, `install` and `fetch` bring each layer, and the `catalog`
//! holds what is here. `preload` brings images from an `archive` instead.

mod archive;
mod auth;
mod blob_reader;
mod catalog;
mod challenge;
mod client;
mod error;
mod failure;
mod fetch;
mod hosts;
mod identity;
mod image_store;
mod images;
mod install;
pub mod layer;
mod limits;
mod manifest;
mod pace;
mod partial;
mod pin;
pub mod position;
mod preload;
mod pull;
mod pulls_in_progress;
mod record;
mod reference;
mod registry;
mod resolved;
mod settings;
mod slots;
mod source;
mod turns;
mod unpacked_layer;

pub use auth::Auth;
pub use catalog::empty_layer;
pub use error::{ImageError, Kind};
pub use hosts::Registries;
pub use image_store::PullEnd;
pub use images::{FsUsage, Images};
pub use pin::Pins;
pub use record::{Image, ImageConfig, LayerName};
pub use reference::Name;
pub use settings::ImageSettings;
