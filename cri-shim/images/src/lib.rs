//! Pulls images from registries, unpacks their layers, and records the images.
//!
//! [`Images`] is the facade of this crate. To read the code of a pull, start with the module
//! `pull`. The module `source` requests the manifest from the registry endpoints that hosts.toml
//! lists. The modules `install` and `fetch` fetch and unpack each layer, and the module `catalog`
//! records the result. The module `preload` imports images from archive files instead of
//! registries.

mod archive;
mod auth;
mod blob_reader;
mod catalog;
mod challenge;
mod client;
mod documents;
mod error;
mod failure;
mod fetch;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod hosts;
mod identity;
mod image_store;
mod images;
mod install;
pub mod layer;
mod limited;
mod limits;
mod manifest;
mod pace;
mod partial;
mod partial_budget;
mod pin;
mod places;
pub mod position;
mod preload;
mod pull;
mod pulls_in_progress;
mod reach;
mod record;
mod reference;
mod registry;
mod removals;
mod request_thread;
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
pub use removals::Removals;
pub use settings::ImageSettings;
