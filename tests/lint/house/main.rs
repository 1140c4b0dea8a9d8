//! Checks the structure of the source tree. It checks the sizes of module loops and the lengths of
//! functions. It also checks whether the name of each type is unique in its crate. A module loop
//! consists of modules that import each other. With `--language`, the program checks whether
//! sentences are plain English. It prints the figures of each crate. If it finds faults, it prints
//! one error message for each fault, and fails.
//!
//! ```text
//! rrun-house [CHECKOUT]               checks modules, functions and names of types
//! rrun-house --figures [CHECKOUT]     only prints the figures of each crate
//! rrun-house --language [CHECKOUT]    checks sentences for constructions listed in CONTRIBUTING.md
//! rrun-house --documents [CHECKOUT]   checks that files and tests named in documents exist
//! rrun-house --draw SEED [CHECKOUT]   prints fifty random sentences, for a fresh reader
//! ```
//!
//! Product code is the code of the crates below the folders in `PRODUCT`. It does not include
//! directories named `tests`, files named `tests.rs`, and items under `#[cfg(test)]`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use graph::{Imports, Module, Modules};
use items::Function;
use tokens::Token;

mod documents;
mod draw;
mod graph;
mod items;
mod language;
mod sentences;
mod tokens;

type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The folders of the checkout that contain the product's crates. The number after a folder is the
/// maximum number of modules in one module loop of the crates in this folder.
const PRODUCT: &[(&str, usize)] = &[
    ("runtime", 4),
    ("kernel", 4),
    ("cri-shim", 10),
    ("proto", 4),
];

/// The maximum number of lines of a function without an attribute. A longer function needs
/// `#[expect(clippy::too_many_lines, reason = …)]` or `#[allow(clippy::too_many_lines)]`.
const LONG: usize = 60;
/// The maximum number of lines of a function with such an attribute.
const TOO_LONG: usize = 100;

/// Standard terms, which a crate is allowed to use as names of several types.
const FIELD_TERMS: &[&str] = &[];

/// The task that the command line requests.
enum Task {
    Check,
    Figures,
    Language,
    Documents,
    Draw(u64),
}

fn main() -> ExitCode {
    let complaints = arguments().and_then(|(task, checkout)| match task {
        Task::Check => measure(&checkout),
        Task::Figures => measure(&checkout).map(|_| Vec::new()),
        Task::Language => language(&checkout),
        Task::Documents => documents::complaints(&checkout),
        Task::Draw(seed) => draw::print(&checkout, seed).map(|()| Vec::new()),
    });
    match complaints {
        Ok(complaints) if complaints.is_empty() => ExitCode::SUCCESS,
        Ok(complaints) => {
            println!();
            for complaint in complaints {
                println!("{complaint}");
            }
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("rrun-house: {error}");
            ExitCode::FAILURE
        }
    }
}

fn arguments() -> Result<(Task, PathBuf)> {
    let mut task = Task::Check;
    let mut checkout = PathBuf::from(".");
    let mut arguments = std::env::args_os().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--figures") => task = Task::Figures,
            Some("--language") => task = Task::Language,
            Some("--documents") => task = Task::Documents,
            Some("--draw") => {
                let seed = arguments.next().unwrap_or_default();
                let seed = seed.to_string_lossy().parse();
                task = Task::Draw(
                    seed.map_err(|error| format!("the SEED of --draw is not a number: {error}"))?,
                );
            }
            _ => checkout = argument.into(),
        }
    }
    Ok((task, checkout))
}

/// Returns the sentences that are not plain English.
fn language(checkout: &Path) -> Result<Vec<String>> {
    let sentences = sentences::of_checkout(checkout)?;
    println!("{} sentences", sentences.len());
    Ok(sentences.iter().filter_map(language::complaint).collect())
}

/// Prints the figures of all crates. Returns a sentence for each fault of the crates.
fn measure(checkout: &Path) -> Result<Vec<String>> {
    let mut complaints = Vec::new();
    println!(
        "{:24} {:>7} {:>12} {:>9} {:>5} {:>5} {:>7}",
        "crate",
        "modules",
        "largest loop",
        "functions",
        format!(">{LONG}"),
        format!(">{TOO_LONG}"),
        "lines"
    );
    let mut measured = 0;
    for (folder, limit) in PRODUCT {
        for dir in crates_below(&checkout.join(folder))? {
            let name = dir.strip_prefix(checkout).unwrap_or(&dir);
            let krate = Crate::read(&name.display().to_string(), &dir)?;
            krate.print();
            complaints.extend(krate.complaints(*limit));
            measured += 1;
        }
    }
    if measured == 0 {
        return Err(format!("{}: this directory contains no crate", checkout.display()).into());
    }
    Ok(complaints)
}

/// Returns the directories at and below `dir` that contain a crate.
fn crates_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    if dir.join("Cargo.toml").is_file() {
        all.push(dir.to_owned());
    }
    for entry in entries(dir)? {
        if entry.is_dir() && !entry.ends_with("target") {
            all.extend(crates_below(&entry)?);
        }
    }
    Ok(all)
}

/// Returns the paths in a directory, sorted by name. Returns an empty list if `dir` is not a
/// directory.
fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let mut all = Vec::new();
    for entry in fs::read_dir(dir)? {
        all.push(entry?.path());
    }
    all.sort();
    Ok(all)
}

/// Returns the product's source files in a crate's directory and its subdirectories, except
/// subdirectories that contain other crates.
fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for entry in entries(dir)? {
        let name = entry.file_name().unwrap_or_default();
        if entry.is_dir() {
            let other = name == "tests" || name == "target" || entry.join("Cargo.toml").is_file();
            if !other {
                all.extend(sources(&entry)?);
            }
        } else if name != "tests.rs" && entry.extension().is_some_and(|kind| kind == "rs") {
            all.push(entry);
        }
    }
    Ok(all)
}

/// The product code of one file.
struct File {
    /// The file's path in the crate.
    path: PathBuf,
    /// The module that the file contains, or `None` if the file is not below src/.
    module: Option<Module>,
    tokens: Vec<Token>,
    lines: usize,
}

/// Returns a crate's files, without modules that are compiled only for tests.
fn product_files(dir: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    let mut test_modules: Vec<Module> = Vec::new();
    for path in sources(dir)? {
        let text = fs::read_to_string(&path)?;
        let product = tokens::product(&tokens::tokens(&text));
        let path = path.strip_prefix(dir)?.to_owned();
        let module = module_of(&path);
        for name in product.test_modules {
            let parent = module.iter().flatten().cloned();
            test_modules.push(parent.chain([name]).collect());
        }
        files.push(File {
            path,
            module,
            tokens: product.tokens,
            lines: text.lines().count().saturating_sub(product.test_lines),
        });
    }
    files.retain(|file| {
        let module = file.module.as_deref().unwrap_or_default();
        !test_modules.iter().any(|test| module.starts_with(test))
    });
    Ok(files)
}

struct Crate {
    name: String,
    imports: Imports,
    /// The loops of modules, the largest loop first.
    loops: Vec<Vec<Module>>,
    /// The functions, each with the file that defines it.
    functions: Vec<(PathBuf, Function)>,
    /// The files and lines in which each type is defined. The key is the type's name.
    types: BTreeMap<String, Vec<String>>,
    lines: usize,
}

impl Crate {
    fn read(name: &str, dir: &Path) -> Result<Crate> {
        let mut krate = Crate {
            name: name.to_owned(),
            imports: Imports::new(),
            loops: Vec::new(),
            functions: Vec::new(),
            types: BTreeMap::new(),
            lines: 0,
        };
        let mut modules = Modules::new();
        for file in product_files(dir)? {
            krate.lines += file.lines;
            let functions = items::functions(&file.tokens).into_iter();
            let functions = functions.map(|function| (file.path.clone(), function));
            krate.functions.extend(functions);
            if let Some(module) = file.module {
                krate.add_types(&file.path, &file.tokens);
                // lib.rs and main.rs count as one root module.
                modules.entry(module).or_default().extend(file.tokens);
            }
        }
        krate.imports = graph::imports(&modules);
        krate.loops = graph::loops(&krate.imports);
        Ok(krate)
    }

    /// Records the types that a file defines. A module can define the same type name several times,
    /// and `cfg` attributes then select one of the definitions. Such a name counts once.
    fn add_types(&mut self, file: &Path, tokens: &[Token]) {
        let mut of_module = BTreeSet::new();
        for one in items::types(tokens) {
            if one.local || of_module.insert(one.name.clone()) {
                let place = format!("{}:{}", file.display(), one.line);
                self.types.entry(one.name).or_default().push(place);
            }
        }
    }

    fn longer_than(&self, lines: usize) -> usize {
        let functions = self.functions.iter();
        functions.filter(|(_, one)| one.lines > lines).count()
    }

    fn print(&self) {
        println!(
            "{:24} {:>7} {:>12} {:>9} {:>5} {:>5} {:>7}",
            self.name,
            self.imports.len(),
            self.loops.first().map_or(0, Vec::len),
            self.functions.len(),
            self.longer_than(LONG),
            self.longer_than(TOO_LONG),
            self.lines
        );
    }

    /// Returns one error message for each fault of the crate.
    fn complaints(&self, limit: usize) -> Vec<String> {
        let loops = self.loops.iter();
        let loops = loops.filter(|modules| modules.len() > limit);
        let mut all: Vec<String> = loops
            .map(|modules| self.loop_complaint(modules, limit))
            .collect();
        let functions = self.functions.iter();
        all.extend(
            functions.filter_map(|(file, function)| self.function_complaint(file, function)),
        );
        for (name, places) in &self.types {
            if places.len() > 1 && !FIELD_TERMS.contains(&name.as_str()) {
                all.push(format!(
                    "{}: the type {name} is defined {} times: {}",
                    self.name,
                    places.len(),
                    places.join(", ")
                ));
            }
        }
        all
    }

    /// Returns the error message about a loop. The first line contains the size of the loop.
    /// Each further line is about one module of the loop, and lists those modules of the loop that it
    /// imports.
    fn loop_complaint(&self, modules: &[Module], limit: usize) -> String {
        let mut text = format!(
            "{}: {} modules import each other in a loop; a loop can have at most {limit} modules:",
            self.name,
            modules.len()
        );
        for module in modules {
            let imports = self.imports.get(module).into_iter().flatten();
            let imports = imports.filter(|import| modules.contains(import));
            let imports: Vec<String> = imports.map(graph::name).collect();
            text += &format!("\n    {} -> {}", graph::name(module), imports.join(", "));
        }
        text
    }

    fn function_complaint(&self, file: &Path, function: &Function) -> Option<String> {
        let what = format!(
            "{}/{}:{}: the function {} has {} lines",
            self.name,
            file.display(),
            function.line,
            function.name,
            function.lines
        );
        if function.lines > TOO_LONG {
            return Some(format!("{what}; the maximum is {TOO_LONG} lines"));
        }
        (function.lines > LONG && !function.may_be_long).then(|| {
            format!(
                "{what}; above {LONG} lines, the function needs an attribute for \
                 clippy::too_many_lines"
            )
        })
    }
}

/// Returns the module that a file contains. Returns `None` if the file's path is not below src/.
fn module_of(path: &Path) -> Option<Module> {
    let path = path.strip_prefix("src").ok()?.with_extension("");
    let mut module: Module = path
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    if module.last().is_some_and(|last| last == "mod") {
        module.pop();
    }
    if let [root] = module.as_slice()
        && matches!(root.as_str(), "lib" | "main")
    {
        module.clear();
    }
    Some(module)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_a_file_determines_its_module() {
        for (path, module) in [
            ("src/lib.rs", Some("")),
            ("src/main.rs", Some("")),
            ("src/a.rs", Some("a")),
            ("src/a/mod.rs", Some("a")),
            ("src/a/main.rs", Some("a::main")),
            ("src/bin/server.rs", Some("bin::server")),
            ("build.rs", None),
        ] {
            let found = module_of(Path::new(path)).map(|module| module.join("::"));
            assert_eq!(found.as_deref(), module, "{path}");
        }
    }
}
