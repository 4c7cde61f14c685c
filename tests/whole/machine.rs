//! One image, a container and a virtual machine: nobody who looks can tell.

use std::{path::PathBuf, time::Duration};

use qvd_demo::{Setup, rfb::Rfb};
use qvd_testkit::{Need, bed_directory, privileged};
use tokio::{io::DuplexStream, time::timeout};

use crate::harness::{PASSWORD, browser, create_desktop, inside, on_a_host, remove_user, run};

/// As long as a boot by emulation and a first picture take on a host that does
/// much else.
const LOOKS_ALIKE_WITHIN: Duration = Duration::from_secs(150);

/// Pixels in a hundred that clocks, graphs of load and a cursor that blinks may
/// differ in.
const DIFFERENT_PERCENT: usize = 2;

fn different_percent(one: &Rfb<DuplexStream>, other: &Rfb<DuplexStream>) -> usize {
    assert_eq!(one.size(), other.size());
    let (width, height) = one.size();
    let places = (0..height).flat_map(|y| (0..width).map(move |x| (x, y)));
    let different = places.filter(|&(x, y)| one.pixel(x, y) != other.pixel(x, y)).count();
    (different * 100).div_ceil(usize::from(width) * usize::from(height))
}

#[test]
fn the_same_flavour_looks_the_same_in_a_container_and_in_a_machine() {
    privileged(&[Need::Bed], || {
        on_a_host(|host| {
            let kernel = bed_directory().unwrap().display().to_string();
            let arguments = ["--vm-kernel", &kernel, "--accel", "tcg", "--vm-disk", "2G"].map(str::to_owned).to_vec();
            let server = Setup { arguments, ..host.setup.clone() }.start().unwrap();
            let user = format!("machine-{}", std::process::id());
            server.add_user(&user, PASSWORD).unwrap();
            // The name is in the prompt of the terminal: of the same length, and read below.
            let container = create_desktop(&server, &user, &["--name", "desk-a"]);
            let machine = create_desktop(&server, &user, &["--name", "desk-b", "--virtualizer", "qemu"]);
            run(async {
                let browser = browser(&server, &user).await;
                let mut one = browser.open(container, 1024, 768).await.unwrap();
                let mut other = browser.open(machine, 1024, 768).await.unwrap();
                let alike = timeout(LOOKS_ALIKE_WITHIN, async {
                    loop {
                        one.rfb.update(false).await.unwrap();
                        other.rfb.update(false).await.unwrap();
                        if one.rfb.colours() >= 16 && different_percent(&one.rfb, &other.rfb) <= DIFFERENT_PERCENT {
                            return;
                        }
                    }
                });
                let alike = alike.await;
                if let Some(dir) = std::env::var_os("QVD_TEST_OUTPUT").map(PathBuf::from) {
                    std::fs::create_dir_all(&dir).unwrap();
                    one.rfb.save_png(&dir.join("container.png")).unwrap();
                    other.rfb.save_png(&dir.join("machine.png")).unwrap();
                }
                alike.unwrap_or_else(|_| panic!("{} % differ", different_percent(&one.rfb, &other.rfb)));
                one.leave();
                other.leave();
            });
            let about = |desktop| inside(&server, desktop, "hostname; uname -r; cat /proc/1/comm");
            let (in_container, in_machine) = (about(container), about(machine));
            assert!(in_container.starts_with("desk-a\n") && in_machine.starts_with("desk-b\n"));
            let kernels = [&in_container, &in_machine].map(|text| text.lines().nth(1).unwrap().to_owned());
            assert_ne!(kernels[0], kernels[1], "the machine has a kernel of its own");
            remove_user(&server, &user);
            server.stop().unwrap();
        });
    });
}
